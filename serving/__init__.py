"""What serve.py is made of: bodies and answers of the API, the engine thread, and the web application."""
