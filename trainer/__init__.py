"""Train the two-tower AlexNet of 2012."""
