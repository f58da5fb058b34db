"""Results: records of finished cells, their store, statistics and tables. Independent of methods and tasks."""
