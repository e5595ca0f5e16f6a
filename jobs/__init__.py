"""What is submitted: run from the repository root with `python -m jobs.NAME`."""
