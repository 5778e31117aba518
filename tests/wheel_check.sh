#!/usr/bin/env bash
# Builds the sdist, from it the wheel, and uses the wheel from an empty folder in a fresh environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
lock=$root/requirements/lock.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH

section() { printf '\n--- %s\n' "$*"; }

section "Build the sdist, and the wheel from it"
"$python" -m build --no-isolation --outdir "$scratch/dist" "$root"

section "Install the wheel in a fresh environment"
"$python" -m venv "$scratch/venv"
bin=$scratch/venv/bin
"$bin/python" -m pip install --quiet -c "$lock" torch
"$bin/python" -m pip install --quiet -c "$lock" "$scratch"/dist/*.whl
mkdir "$scratch/empty"
cd "$scratch/empty"

section "An environment on the packaged sample"
"$bin/python" -c "import gymnasium as gym; gym.make('kvenv:kvenv/Rank-v1').reset(seed=0)"

section "The command line"
"$bin/kvenv" --help
"$bin/kvenv" record --help >help.txt
"$bin/kvenv" inspect sample
"$bin/kvenv" train kvp --traces sample --steps 2 --out bundle
test -s bundle/model.safetensors -a -s bundle/config.json
"$bin/kvenv" evaluate --traces sample --agents knorm,bundle --json evaluation.json
"$bin/kvenv" report evaluation.json
test -s report.html

section "The trained agents"
"$bin/python" - "$root" <<'PYTHON'
import sys
from pathlib import Path

from kvenv.plugins import trained
from kvenv.scorers import load_scorer

shipped = {path.parent.name for path in Path(sys.argv[1]).glob("agents/trained/*/config.json")}
if set(trained()) != shipped:
    sys.exit(f"the wheel has {sorted(trained())}, the checkout {sorted(shipped)}")
for name in sorted(shipped):
    if not load_scorer(name).card:
        sys.exit(f"{name} has no card")
    print(name)
PYTHON

section "Nothing came from the checkout"
"$bin/python" - "$root" <<'PYTHON'
import sys
from pathlib import Path

import kvenv
from kvenv.plugins import available

root = Path(sys.argv[1]).resolve()
paths = [Path(kvenv.__file__), *available("agent").values(), *available("workload").values()]
strays = [str(path) for path in paths if root in path.resolve().parents]
sys.exit(f"from the checkout: {strays}" if strays else 0)
PYTHON

section "The wheel stands on its own"
