"""ComfyUI's own server as an object: started on a free port of 127.0.0.1, its log kept, surely stopped.

    with ComfyUIServer(comfyui, home, packs={"lcm-kit": repository}, models=[folder]) as server:
        print(server.url)

Talk to it with comfyui_client.py. Knows nothing about LCM Kit; the demo and the tests both use it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL = 40  # lines of the log that an error shows


class ServerError(RuntimeError):
    """The server did not start, died, or answered with an error; the message ends with the log's last lines."""


class ComfyUIServer:
    """A ComfyUI in its own process and its own base directory; use it with `with`.

    comfyui: the folder of main.py.   home: base directory, made if absent; keeps log, output and input.
    packs: name under custom_nodes -> folder, linked.   models: folders laid out like ComfyUI's models/ (loras/x, ...),
    linked file by file, so that what nodes write stays in home.   arguments: more of main.py's options.
    cpu: compute there even where there is a GPU, so that pictures are the same everywhere.
    """

    def __init__(
        self,
        comfyui: str | Path,
        home: str | Path,
        *,
        packs: Mapping[str, Path] | None = None,
        models: Sequence[Path] = (),
        arguments: Sequence[str] = (),
        python: str = sys.executable,
        start_seconds: float = 300,
        cpu: bool = True,
    ):
        self.comfyui, self.home = Path(comfyui).expanduser().resolve(), Path(home).resolve()
        self.packs, self.models, self.arguments = dict(packs or {}), list(models), list(arguments)
        self.python, self.start_seconds, self.cpu = python, start_seconds, cpu
        self.log, self.output, self.input = self.home / "server.log", self.home / "output", self.home / "input"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        # A proxy from the environment must not see 127.0.0.1.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyUIServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the server answers. Raises ServerError with the log's tail if it never does."""
        furnish(self.home, self.packs, self.models)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [self.python, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        # The default database lies in ComfyUI's own folder, and only one server can have it. One in memory is a new,
        # empty one for every thread, which ComfyUI logs as errors.
        database = f"sqlite:///{self.home / 'comfyui.db'}"
        command += ["--base-directory", str(self.home), "--database-url", database]
        command += [*(["--cpu"] if self.cpu else []), "--disable-auto-launch", "--disable-api-nodes", *self.arguments]
        # If this process is killed, no clean-up of ours runs; on Linux the kernel then ends the server.
        # (It does so as well when the thread that called start() ends.)
        tie = ["setpriv", "--pdeathsig", "TERM"]
        if shutil.which(tie[0]) and subprocess.run([*tie, "true"], capture_output=True).returncode == 0:
            command = [*tie, "--", *command]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # ComfyUI is some 500 modules: bytecode halves its start
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and stop() reaches all its children
            )
        atexit.register(self.stop)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server and its children and waits for them; safe to call twice."""
        process, self.process = self.process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        for sign, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 30)):
            try:
                os.killpg(process.pid, sign)  # the group outlives its leader while a child runs
            except ProcessLookupError:
                pass
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def failure(self, what: str) -> ServerError:
        """A ServerError that says `what` and shows the end of the log."""
        tail = "\n".join(self.log_text().splitlines()[-TAIL:])
        return ServerError(f"{what}\n--- end of {self.log} ---\n{tail}")

    def request(self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes:
        """GET, or POST if there is a body. Raises ServerError; HTTP status errors as urllib.error.HTTPError."""
        request = urllib.request.Request(self.url + path, data=body, headers=dict(headers or {}))
        try:
            with self._opener.open(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise self.failure(f"no answer from {self.url}{path}: {error}") from error

    def check_alive(self) -> None:
        if self.process is None:
            raise ServerError("the server is not running: use it inside `with`")
        if self.process.poll() is not None:
            raise self.failure(f"ComfyUI ended with status {self.process.returncode}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                self.request("/system_stats")
                return
            except (ServerError, urllib.error.HTTPError):
                time.sleep(0.2)
        raise self.failure(f"ComfyUI did not answer within {self.start_seconds:.0f} s")


def furnish(home: Path, packs: Mapping[str, Path], models: Sequence[Path]) -> None:
    """Makes `home` a base directory of ComfyUI with links to packs and model files; see ComfyUIServer."""
    for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (home / name).mkdir(parents=True, exist_ok=True)
    for name, folder in packs.items():
        _link(home / "custom_nodes" / name, folder)
    for folder in models:
        for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
            _link(home / "models" / file.relative_to(folder), file)


def _link(link: Path, target: Path) -> None:
    """Makes `link` point at `target`, also when a former run left another link there."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target.resolve(), target_is_directory=target.is_dir())
