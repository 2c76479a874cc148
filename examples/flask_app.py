"""Deferred calls in a Flask app, at http://127.0.0.1:8080/greet/Ada."""

from flask import Flask

import deferlib

app = Flask(__name__)
app.wsgi_app = deferlib.wrap_wsgi_app(app.wsgi_app)


def greet(name: str) -> None:
    print(f"Hello, {name}!")


@app.get("/greet/<name>")
def view(name: str) -> tuple[str, int]:
    deferlib.defer(greet, name)
    return "Later.\n", 202
