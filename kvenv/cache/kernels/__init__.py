"""The Triton kernels of the cache, one file each, beside plain references of theirs."""
