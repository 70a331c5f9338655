"""GLUE under the paper's protocol: tasks, data, metrics, the grid, its runs and their report."""
