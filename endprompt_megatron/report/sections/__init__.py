"""The report's sections, in the order of the page: what each shows of the runs' files."""
