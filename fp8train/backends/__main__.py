"""`python -m fp8train.backends`: check the kernels on this machine's first GPU, before a run has to (admission.py)."""

import sys

from fp8train.backends.admission import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
