"""Contract checks for agents, scorers and workloads of one's own; the shipped ones pass them too.

A check returns nothing, or raises `KvenvError` naming the point that is broken, the value seen and
the cure:

    >>> from kvenv import plugins
    >>> from kvenv.testing import check_agent
    >>> check_agent(plugins.load("agent", "knorm"))
"""

from kvenv.testing.agents import check_agent
from kvenv.testing.scorers import check_scorer
from kvenv.testing.workloads import check_workload

__all__ = ["check_agent", "check_scorer", "check_workload"]
