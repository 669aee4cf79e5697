"""Pages that open from disk: of runs, comparisons, studies and all of them."""

from dense_rlhf.files import content_key, file_sha256
from dense_rlhf.fingerprint import PACKAGE, modules, source_key


def pages_key() -> str:
    """Hash of the code and the templates that draw pages; `summary.json` keeps the key that its pages were drawn by."""
    templates = [file_sha256(path) for path in sorted(PACKAGE.glob("*/template/*"))]
    return content_key([source_key(*(name for name in modules() if name.startswith(__name__))), templates])
