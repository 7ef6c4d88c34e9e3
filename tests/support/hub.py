"""A hub that speaks Hugging Face's protocol for uploads, and keeps what it is given."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field

from aiohttp import web

TOKEN = "hf_right"


@dataclass
class Hub:
    """What was made and uploaded."""

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """By id, whether private."""
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    may_write: bool = True

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._allowed])
        app.router.add_post("/api/repos/create", self._create)
        app.router.add_get("/api/whoami-v2", self._whoami)
        app.router.add_post("/api/models/{id:.+}/preupload/main", self._preupload)
        app.router.add_post("/api/models/{id:.+}/commit/main", self._commit)
        app.router.add_post("/{id:.+}.git/info/lfs/objects/batch", self._batch)
        app.router.add_put("/objects/{oid}", self._put)
        app.router.add_post("/api/validate-yaml", self._fine)
        return app

    @web.middleware
    async def _allowed(self, request: web.Request, handler: object) -> web.StreamResponse:
        if not request.path.startswith("/objects/") and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "Invalid username or password."}, status=401)
        if not self.may_write and request.method == "POST":
            return web.json_response({"error": "You don't have the rights to create a model here"}, status=403)
        return await handler(request)  # type: ignore[operator]

    async def _fine(self, request: web.Request) -> web.Response:
        return web.json_response({"warnings": [], "errors": []})

    async def _whoami(self, request: web.Request) -> web.Response:
        return web.json_response({"type": "user", "name": "someone", "orgs": []})

    async def _create(self, request: web.Request) -> web.Response:
        given = await request.json()
        repo_id = f"{given.get('organization') or 'someone'}/{given['name']}"
        if repo_id in self.repos:
            return web.json_response({"error": "exists", "url": f"{self.url}/{repo_id}"}, status=409)
        self.repos[repo_id] = given.get("private") or given.get("visibility") == "private"
        return web.json_response({"url": f"{self.url}/{repo_id}", "name": repo_id})

    async def _preupload(self, request: web.Request) -> web.Response:
        files = (await request.json())["files"]

        def told(file: dict[str, object]) -> dict[str, object]:
            by_lfs = str(file["path"]).endswith(".safetensors")
            return {"path": file["path"], "uploadMode": "lfs" if by_lfs else "regular", "shouldIgnore": False}

        return web.json_response({"files": [told(file) for file in files]})

    async def _batch(self, request: web.Request) -> web.Response:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.url}/objects/{asked['oid']}"}}}
            for asked in (await request.json())["objects"]
        ]
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _put(self, request: web.Request) -> web.Response:
        data = await request.read()
        assert hashlib.sha256(data).hexdigest() == request.match_info["oid"]
        self.objects[request.match_info["oid"]] = data
        return web.Response()

    async def _commit(self, request: web.Request) -> web.Response:
        repo_id = request.match_info["id"]
        if repo_id not in self.repos:
            return web.json_response({"error": "Repository not found"}, status=404)
        for line in (await request.read()).splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                self.files[repo_id, row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                self.files[repo_id, row["value"]["path"]] = self.objects[row["value"]["oid"]]
        oid = "1" * 40
        return web.json_response({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"})


class RunningHub:
    """`with RunningHub() as hub`: on a port of its own, in a thread."""

    def __enter__(self) -> Hub:
        self._hub, started = Hub(), threading.Event()

        async def serve() -> None:
            self._stop = asyncio.Event()
            self._loop = asyncio.get_running_loop()
            runner = web.AppRunner(self._hub.app())
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self._hub.url = f"http://{host}:{port}"
            started.set()
            await self._stop.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self._thread.start()
        assert started.wait(10)
        return self._hub

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
