"""An nginx of the test's own, as users configure it before their app."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.store.children import need
from tests.system.processes import free_port, listens, wait_until

# What stands in the server's block: each names where requests go on to by {app}.
CONFIGURATIONS = {
    "plain": "location / { proxy_pass http://{app}; }",
    "loose": """
        underscores_in_headers on;
        ignore_invalid_headers off;
        location / {
            proxy_pass http://{app};
            proxy_set_header Host $host;
            proxy_set_header X-Real-IP $remote_addr;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
        }""",
    "stripped": "location /tasks/ { proxy_pass http://{app}/; }",
    "kept-alive": """
        gzip on;
        gzip_min_length 1;
        gzip_proxied any;
        gzip_types *;
        location / {
            proxy_pass http://kept;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Accept-Encoding gzip;
        }""",
}
_HEAD = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events { worker_connections 256; }
http {
    access_log off;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/answers;
    fastcgi_temp_path {folder}/unused;
    uwsgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    client_max_body_size 33m;
    proxy_read_timeout 610s;
    upstream kept { server {app}; keepalive 8; }
"""


@contextmanager
def proxy(folder: Path, port: int) -> Iterator[dict[str, int]]:
    """Run nginx before the app on *port*; give the port of each of the CONFIGURATIONS."""
    command = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    need(command is not None, "nginx")
    ports = {name: free_port() for name in CONFIGURATIONS}
    servers = [f"server {{ listen 127.0.0.1:{ports[name]}; {block} }}" for name, block in CONFIGURATIONS.items()]
    text = "\n".join([_HEAD, *servers, "}"]).replace("{folder}", str(folder)).replace("{app}", f"127.0.0.1:{port}")
    (folder / "nginx.conf").write_text(text)
    with subprocess.Popen(
        [str(command), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")],
        start_new_session=True,
    ) as process:
        try:
            wait_until(lambda: all(map(listens, ports.values())) or process.poll() is not None, "nginx listens")
            assert process.poll() is None, (folder / "nginx.log").read_text()
            yield ports
        finally:
            process.kill()
