"""Reports: runs and results as tables, pictures and model cards. They read results and measure nothing."""
