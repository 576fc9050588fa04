"""Out of the library: pipelines, graphs and model cards."""
