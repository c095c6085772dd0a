"""What a person reads: tables, the console, the allocation, the report of a run."""
