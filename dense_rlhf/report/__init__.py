"""Pages that open from disk: of runs, comparisons, studies and all of them."""

from dense_rlhf.fingerprint import modules, source_key


def pages_key() -> str:
    """Hash of the code and the templates that draw pages; `summary.json` keeps the key that its pages were drawn by."""
    return source_key(*(name for name in modules() if name.startswith(__name__)))
