"""Uploads: what goes where, trying again, and that neither failures nor tokens get out."""

import logging
import threading
from types import SimpleNamespace

import pytest

from library.errors import UserError
from library.training.hub_state import HubPlace, download_state, parse_place
from library.training.options import HubOptions
from library.training.upload import Uploader, without_token


class HubError(Exception):
    def __init__(self, status, text="no"):
        super().__init__(text)
        self.response = SimpleNamespace(status_code=status)


class Api:
    """Stands for the hub's client; `fail` holds the errors of the next calls."""

    def __init__(self, *fail):
        self.fail, self.calls, self.gate = list(fail), [], None

    def _answer(self, name, arguments):
        if self.gate is not None:
            self.gate.wait(5)
        self.calls.append((name, arguments))
        if self.fail and (error := self.fail.pop(0)) is not None:
            raise error

    def create_repo(self, repo_id, **arguments):
        self._answer("create", {"repo_id": repo_id, **arguments})

    def upload_file(self, **arguments):
        self._answer("file", arguments)

    def upload_folder(self, **arguments):
        self._answer("folder", arguments)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "n.safetensors"
    path.write_bytes(b"x")
    return path


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "n-state"
    path.mkdir()
    return path


def uploader(api, waits=None, **options):
    hub = HubOptions(**{"huggingface_repo_id": "u/r"} | options)
    return Uploader(hub, api=api, sleep=(waits if waits is not None else []).append)


class TestPlaces:
    @pytest.mark.parametrize(
        ("prefix", "kind", "place"),
        [
            (None, "file", "n.safetensors"),
            ("a/b", "file", "a/b/n.safetensors"),
            ("/a/", "file", "a/n.safetensors"),
            (None, "model folder", None),
            ("a", "model folder", "a/n-state"),
            (None, "state", "n-state"),
            ("a", "state", "a/n-state"),
        ],
    )
    def test_place_in_the_repository(self, model, state, prefix, kind, place):
        api = Api()
        sender = uploader(
            api, huggingface_path_in_repo=prefix, save_state_to_huggingface=True, huggingface_repo_type="dataset"
        )
        sender(model if kind == "file" else state, kind == "state", False)
        ((_, arguments),) = api.calls
        assert arguments["path_in_repo"] == place
        assert (arguments["repo_id"], arguments["repo_type"]) == ("u/r", "dataset")

    def test_states_only_when_asked_for(self, state):
        api = Api()
        uploader(api)(state, True, False)
        assert api.calls == []

    def test_without_repository_nothing_happens(self, model):
        sender = uploader(None, huggingface_repo_id=None)
        sender.prepare()
        sender(model, False, True)
        assert sender.close() == []

    @pytest.mark.parametrize(("visibility", "private"), [(None, True), ("private", True), ("public", False)])
    def test_the_repository_is_made(self, visibility, private):
        api = Api()
        uploader(api, huggingface_repo_visibility=visibility).prepare()
        assert api.calls == [("create", {"repo_id": "u/r", "repo_type": None, "private": private, "exist_ok": True})]


class TestFailures:
    def test_tried_again_with_growing_pauses(self, model):
        waits = []
        sender = uploader(Api(OSError("cut"), HubError(503), None), waits)
        sender(model, False, False)
        assert waits == [2.0, 4.0]
        assert sender.close() == []

    def test_five_times_at_most(self, model, caplog):
        waits = []
        sender = uploader(Api(*[OSError("cut")] * 9), waits)
        sender(model, False, False)
        assert len(waits) == 4
        assert [result.name for result in sender.close()] == ["n.safetensors"]
        assert "n.safetensors was not uploaded to u/r" in caplog.text

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_a_refusal_is_final(self, model, status):
        waits = []
        sender = uploader(Api(HubError(status)), waits)
        sender(model, False, False)
        assert (waits, len(sender.close())) == ([], 1)

    def test_a_file_removed_meanwhile_is_not_tried_again(self, model):
        model.unlink()
        waits = []
        sender = uploader(Api(FileNotFoundError("gone")), waits)
        sender(model, False, False)
        assert (waits, len(sender.close())) == ([], 1)

    def test_a_wrong_repository_is_said_before_training(self, caplog):
        with pytest.raises(UserError, match="--huggingface_repo_id u/r: no"):
            uploader(Api(HubError(403))).prepare()
        with caplog.at_level(logging.WARNING):
            uploader(Api(OSError("unreachable"))).prepare()
        assert "cannot be reached" in caplog.text

    def test_tokens_are_hidden(self, model, caplog):
        token = "hf_" + "abcDEF123" * 3
        with caplog.at_level(logging.INFO):
            sender = uploader(Api(*[OSError(f"bad {token} and secret")] * 5), huggingface_token="secret")
            sender(model, False, False)
            sender.close()
        assert token not in caplog.text
        assert "secret" not in caplog.text
        assert without_token("x", None) == "x"


class TestBackground:
    def test_training_does_not_wait_but_the_last_model_does(self, model):
        api = Api()
        api.gate = threading.Event()
        sender = uploader(api, async_upload=True)
        sender(model, False, False)
        assert api.calls == []
        api.gate.set()
        sender(model, False, True)
        assert len(api.calls) >= 1
        assert sender.close() == []
        assert len(api.calls) == 2

    def test_a_hanging_upload_does_not_keep_the_program(self, model):
        api = Api()
        api.gate = threading.Event()
        sender = uploader(api, async_upload=True)
        sender(model, False, False)
        assert "not finished" in sender.close(timeout=0.05)[0].error
        api.gate.set()

    def test_a_full_queue_is_counted(self, model):
        api = Api()
        api.gate = threading.Event()
        sender = uploader(api, async_upload=True)
        for _ in range(25):
            sender(model, False, False)
        api.gate.set()
        failed = sender.close()
        assert 0 < len(failed) < 10
        assert len(sender.results) == 25


class TestResume:
    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("u/r/a/b", HubPlace("u/r", "a/b")),
            ("u/r/a:main", HubPlace("u/r", "a", "main", "model")),
            ("u/r/a:main:dataset", HubPlace("u/r", "a", "main", "dataset")),
        ],
    )
    def test_names(self, text, place):
        assert parse_place(text) == place

    @pytest.mark.parametrize("text", ["u/r", "x", "", "u/r/../../etc", "u//a/b", "u/r/a:b:c:d"])
    def test_names_that_are_none(self, text):
        with pytest.raises(UserError, match="does not name a folder"):
            parse_place(text)

    def hub(self, tmp_path, *names):
        def download(filename, **_):
            path = tmp_path / "snapshot" / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            return str(path)

        return SimpleNamespace(list_repo_files=lambda **_: list(names), hf_hub_download=download)

    def test_download(self, tmp_path):
        api = self.hub(tmp_path, "README.md", "n-state/resume.json", "n-state/optimizer.bin", "n-state2/x")
        folder = download_state("u/r/n-state", HubOptions(), api)
        assert sorted(path.name for path in folder.iterdir()) == ["optimizer.bin", "resume.json"]

    @pytest.mark.parametrize("name", ["s/../../x", "s/deeper/x", "s/a\\b", "s/custom_checkpoint_0.pkl"])
    def test_names_that_are_refused(self, tmp_path, name):
        with pytest.raises(UserError, match="refused"):
            download_state("u/r/s", HubOptions(), self.hub(tmp_path, "s/resume.json", name))
        assert list(tmp_path.iterdir()) == []

    def test_nothing_there_or_no_network(self, tmp_path):
        with pytest.raises(UserError, match="no file in the repository"):
            download_state("u/r/s", HubOptions(), self.hub(tmp_path, "other/x"))

        def fail(**_):
            raise OSError("unreachable with secret")

        with pytest.raises(UserError, match="cannot be downloaded") as caught:
            download_state("u/r/s", HubOptions(huggingface_token="secret"), SimpleNamespace(list_repo_files=fail))
        assert "secret" not in str(caught.value)
