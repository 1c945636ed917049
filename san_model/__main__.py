"""python -m san_model, and san where the package is installed."""

import sys


def main() -> int:
    """Runs the command line, where all that the commands need is installed; returns the exit status."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("isqrt_cov", "san_model"):
            raise
        print(f"san: error: {error.name} is missing: pip install 'isqrt_cov[san]'", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
