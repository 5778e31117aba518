"""A model run, watched: workloads in, trace sets out."""
