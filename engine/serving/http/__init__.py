"""Serving over HTTP: the application, its requests and answers, and the servers that run it."""
