"""Images: loading, the plan of crops, pixels."""
