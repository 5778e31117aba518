"""How good a ranking, a bounded cache or a decoded answer is."""
