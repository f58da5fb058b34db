"""Results: records of finished cells, their store, and tables of them. Knows neither methods nor tasks."""
