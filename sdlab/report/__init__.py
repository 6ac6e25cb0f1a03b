"""The paper's numbers, tables, figures and costs."""
