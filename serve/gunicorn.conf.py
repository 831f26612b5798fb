"""How Gunicorn runs the service: gunicorn -c serve/gunicorn.conf.py serve.app:app"""

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serve import settings as serve_settings  # noqa: E402
from serve import supervisor  # noqa: E402

settings = serve_settings.load()
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
with contextlib.suppress(ValueError, OSError):  # where what is allowed is more than can be had
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a descriptor, and a usual limit is 1024
keeper = supervisor.Supervisor(supervisor.make_run_folder())

chdir = str(ROOT)
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.workers
threads = settings.http_threads
worker_class = "serve.worker.Worker"
worker_connections = 4 * settings.http_threads
preload_app = True  # the application holds no model, so a new process is there at once
keepalive = 75
forwarded_allow_ips = ""  # no proxy's word on paths, schemes or scripts; for clients' addresses see SERVE_TRUSTED_PROXIES
forwarder_headers = ""
logger_class = "serve.logs.GunicornLogger"
timeout = 60  # without a sign of life from a process' main loop
graceful_timeout = int(settings.timeout_seconds) + 1
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  a disk can block the sign of life
control_socket_disable = True
accesslog = None  # the application logs its requests itself
proc_name = "sentiment"


def on_starting(server: Any) -> None:
    keeper.watch(server)


def child_exit(server: Any, worker: Any) -> None:  # noqa: ARG001
    supervisor.forget(worker.pid)


def on_exit(server: Any) -> None:  # noqa: ARG001
    keeper.stop()
