"""Run the project's commands as Ray jobs."""
