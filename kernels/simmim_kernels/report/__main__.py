"""`python -m simmim_kernels.report`: runs the command, or says that Triton is missing."""

import sys

try:
    from simmim_kernels.report.command import main
except ImportError as error:
    raise SystemExit(f"the report needs Triton: {error} (`pip install triton`, Linux)") from error

if __name__ == "__main__":
    sys.exit(main())
