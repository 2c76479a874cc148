"""Deferred calls in a Django project of one file, at http://127.0.0.1:8080/greet/Ada."""

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

import deferlib

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1", "localhost"])


def greet(name: str) -> None:
    print(f"Hello, {name}!")


def view(request: HttpRequest, name: str) -> HttpResponse:
    deferlib.defer(greet, name)
    return HttpResponse("Later.\n", status=202)


urlpatterns = [path("greet/<name>", view)]
application = deferlib.wrap_wsgi_app(get_wsgi_application())
