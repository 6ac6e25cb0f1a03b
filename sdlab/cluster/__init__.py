"""Tasks in this process, on local workers or on a Dask cluster."""
