"""Pages that open from disk: of runs, comparisons, studies and all of them."""
