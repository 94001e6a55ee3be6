"""The server of rewards: reading of requests, the queue before the device, and the HTTP routes."""
