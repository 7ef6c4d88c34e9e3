"""An export on a hub that speaks Hugging Face's protocol: huggingface_hub does it, and its faults are told in a line.

`HF_TOKEN` or `hf auth login` says who pushes, `HF_ENDPOINT` where to. *Not covered*: branches, pull requests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from envs.errors import UserError


def claim(repo_id: str) -> str:
    """Have the repository, private where it is new; its full name. Before an export, which takes long, is made."""
    from huggingface_hub import HfApi

    with _told(repo_id):
        return str(HfApi().create_repo(repo_id, private=True, exist_ok=True).repo_id)


def push(folder: Path, repo_id: str) -> str:
    """Upload the folder as one commit; its address. What was there under other names stays."""
    from huggingface_hub import HfApi

    with _told(repo_id):
        done = HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{folder.name} of agent-rft")
    return done.commit_url


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    where = f"--push {repo_id}: {constants.ENDPOINT}"
    try:
        yield
    except HFValidationError as e:
        raise UserError(f"--push {repo_id}: {str(e).splitlines()[0]}; expected NAME or OWNER/NAME") from None
    except LocalTokenNotFoundError:
        raise UserError(f"{where} is told by no token who pushes; set HF_TOKEN, or run `hf auth login`") from None
    except OfflineModeIsEnabled:
        raise UserError(f"--push {repo_id}: HF_HUB_OFFLINE is set; unset it to push") from None
    except HfHubHTTPError as e:
        code = e.response.status_code if e.response is not None else 0
        remedy = {401: "; is HF_TOKEN right?", 403: "; has the token the right to write there?"}.get(code, "")
        raise UserError(f"{where} refuses: {e.server_message or f'HTTP {code}'}{remedy}") from e
    except (httpx.HTTPError, OSError) as e:
        raise UserError(f"{where} can't be reached: {' '.join(str(e).split()) or type(e).__name__}") from e
