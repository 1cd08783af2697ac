"""A client of ComfyUI's HTTP and websocket API.

    with Client(server) as client:
        for event in client.follow(client.submit(workflow)):
            print(event.kind, event.node, event.data)
        pictures = client.images(client.run(other_workflow))

`server` is a ComfyUIServer from comfyui_server.py. Workflows are in API format ({id: {class_type, inputs}}).
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp


class Server(Protocol):
    """What a client needs of ComfyUIServer."""

    @property
    def url(self) -> str: ...
    def request(self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes: ...
    def check_alive(self) -> None: ...
    def failure(self, what: str) -> Exception: ...


class PromptRejected(RuntimeError):
    """The server refused a workflow before running it. `answer` is its JSON: error and node_errors."""

    def __init__(self, answer: dict[str, Any]):
        lines = [answer["error"]["message"]] if answer.get("error") else []
        for node, found in answer.get("node_errors", {}).items():
            lines += [f"node {node} ({found['class_type']}): {e['message']}: {e['details']}" for e in found["errors"]]
        super().__init__("\n".join(lines))
        self.answer = answer


class ExecutionFailed(RuntimeError):
    """A node raised while the workflow ran: `node` its id, `node_type` its class, `error` its message."""

    def __init__(self, data: dict[str, Any]):
        self.node, self.node_type, self.error = data["node_id"], data["node_type"], data["exception_message"].strip()
        super().__init__(f"node {self.node} ({self.node_type}): {self.error}")


@dataclass(frozen=True)
class Event:
    """One websocket message of a run.

    kind: execution_start, execution_cached, executing, progress (data: value, max), preview (data: image bytes),
    executed (data: output), execution_success, execution_error (data: node_type, exception_message, traceback, ...),
    execution_interrupted, or progress_state.   node: the node's id, or None.
    """

    kind: str
    node: str | None
    data: Any


class Client:
    """One client id with its websocket; use it with `with`.

    The websocket is open from the start, so that no event of a run is missed. It lives in a thread of its own: the
    caller may run an event loop (Playwright does) without the two meeting.
    """

    def __init__(self, server: Server):
        self.server = server
        self.id = uuid.uuid4().hex
        self._messages: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._listen, name="comfyui-websocket", daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        try:
            kind, data = self._messages.get(timeout=60)  # the server greets every client with its status
        except queue.Empty:
            kind, data = "closed", "no greeting within 60 s"
        if kind == "closed":
            self.__exit__()
            raise self.server.failure(f"no websocket at {self.server.url}: {data}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()

    def submit(self, workflow: Mapping[str, Any]) -> str:
        """Queues a workflow in API format, returns its prompt id. Raises PromptRejected if it is not valid."""
        try:
            answer = self._post("/prompt", {"prompt": workflow, "client_id": self.id})
        except urllib.error.HTTPError as error:
            with error:
                text = error.read()
            raise PromptRejected(json.loads(text)) from None
        return str(answer["prompt_id"])

    def follow(self, prompt_id: str, timeout: float = 600) -> Iterator[Event]:
        """Events of one run until the server has filed it in its history; silent longer than `timeout` s raises."""
        quiet_since = time.monotonic()
        while True:
            try:
                kind, data = self._messages.get(timeout=1)
            except queue.Empty:
                self.server.check_alive()
                if time.monotonic() - quiet_since > timeout:
                    raise self.server.failure(f"prompt {prompt_id}: no message for {timeout:.0f} s") from None
                continue
            quiet_since = time.monotonic()
            if kind == "closed":
                raise self.server.failure(f"prompt {prompt_id}: the websocket closed: {data}")
            if kind == "preview":
                yield Event(kind, None, data)
            elif isinstance(data, dict) and data.get("prompt_id") == prompt_id:
                node = data.get("node", data.get("node_id"))
                if kind == "executing" and node is None:
                    return
                yield Event(kind, node, data)

    def run(self, workflow: Mapping[str, Any], timeout: float = 600) -> dict[str, Any]:
        """Runs a workflow to its end: node id -> output, from the history. Raises ExecutionFailed for a node's error."""
        prompt_id = self.submit(workflow)
        for event in self.follow(prompt_id, timeout):
            if event.kind == "execution_error":
                failed = event.data
                break
        else:
            return dict(self.history(prompt_id)["outputs"])
        raise ExecutionFailed(failed)

    def history(self, prompt_id: str) -> dict[str, Any]:
        """outputs (node id -> ui output), status and prompt of a finished run."""
        return dict(self._get(f"/history/{prompt_id}")[prompt_id])

    def view(self, image: Mapping[str, str]) -> bytes:
        """The file behind an entry of an output's `images`: {filename, subfolder, type}."""
        return self.server.request("/view?" + urllib.parse.urlencode(image))

    def images(self, outputs: Mapping[str, Any]) -> list[bytes]:
        """Every image of run()'s result, as files, in the order of the nodes."""
        return [self.view(image) for output in outputs.values() for image in output.get("images", [])]

    def upload_image(self, file: Path) -> str:
        """Puts an image into the server's input folder; returns the name that LoadImage takes."""
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{file.name}"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        body = head.encode() + file.read_bytes() + f"\r\n--{edge}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        return str(json.loads(self.server.request("/upload/image", body, headers))["name"])

    def object_info(self) -> dict[str, Any]:
        """Node id -> what the web page knows about it."""
        return dict(self._get("/object_info"))

    def interrupt(self) -> None:
        self.server.request("/interrupt", b"{}", {"Content-Type": "application/json"})

    def _get(self, path: str) -> Any:
        return json.loads(self.server.request(path))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return json.loads(self.server.request(path, json.dumps(body).encode(), {"Content-Type": "application/json"}))

    def _listen(self) -> None:
        try:
            self._loop.run_until_complete(self._receive())
        except Exception as error:  # whatever it was: the waiting side must hear of it
            self._messages.put(("closed", repr(error)))
        else:
            self._messages.put(("closed", "by the server"))

    async def _receive(self) -> None:
        stop = asyncio.create_task(self._stopped.wait())
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.server.url}/ws?clientId={self.id}", max_msg_size=0) as ws:
                while not ws.closed:
                    message = asyncio.create_task(ws.receive())
                    await asyncio.wait([message, stop], return_when=asyncio.FIRST_COMPLETED)
                    if stop.done():
                        message.cancel()
                        await asyncio.gather(message, return_exceptions=True)
                        return
                    self._take(message.result())
        stop.cancel()

    def _take(self, message: aiohttp.WSMessage) -> None:
        if message.type == aiohttp.WSMsgType.TEXT:
            content = json.loads(message.data)
            self._messages.put((content["type"], content["data"]))
        elif message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == b"\0\0\0\1":
            self._messages.put(("preview", message.data[8:]))  # 4 bytes event, 4 bytes JPEG or PNG, then the file
