"""Deferred calls in a FastAPI app, at http://127.0.0.1:8080/greet/Ada."""

from fastapi import FastAPI

import deferlib
from deferlib.contrib.asgi import Middleware

app = FastAPI()
app.add_middleware(Middleware)


async def greet(name: str) -> None:
    print(f"Hello, {name}!")


@app.get("/greet/{name}", status_code=202)
async def view(name: str) -> str:
    await deferlib.adefer(greet, name)
    return "Later."
