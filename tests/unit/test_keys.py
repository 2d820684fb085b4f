"""`swarm keys`: k of n organizers change who governs and which key publishes, each on a machine of his own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swarm import governance, keyfiles, run_spec
from swarm.cli import governing, keys
from swarm.cli.organizer import started_spec
from swarm.errors import ConfigError, DataError, DigestError, SignatureError, SwarmError, VerificationError
from swarm.identity import Identity
from swarm.run_spec import RunSpec
from tests.checkpoint_samples import data_manifest, make_spec


@dataclass
class Organizers:
    """Anna started the run; Bea and Carl govern it with her, two of three must sign. Dora is nobody yet."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    threshold: int = 2
    keys: dict[str, Identity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("anna", "bea", "carl", "dora"):
            self.be(name)
            self.keys[name] = keyfiles.load_or_create(keyfiles.data_home() / "organizer.key")
        self.state.mkdir()
        publication = keyfiles.load_or_create(self.state / "publication.key")
        others = [self.keys[name].public_key.hex() for name in ("bea", "carl")]
        values = make_spec(data_manifest()).model_dump() | {
            "organizer_key": self.keys["anna"].public_key.hex(),
            "publication_key": publication.public_key.hex(),
            "governance": {"organizers": others, "threshold": self.threshold},
        }
        self.spec = RunSpec.model_validate(values)
        signed = self.keys["anna"].sign(run_spec.CONTEXT, self.spec.run_id, self.spec.canonical_bytes())
        (self.state / "spec.sig").write_bytes(signed.SerializeToString())

    @property
    def run_file(self) -> Path:
        return self.folder / "run.toml"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def be(self, name: str) -> None:
        self.monkeypatch.setenv("XDG_DATA_HOME", str(self.folder / name))

    def start(self) -> governance.Offline:
        self.be("anna")
        return governing.begin(self.state, self.spec, self.keys["anna"])

    def run(self, who: str, *arguments: object) -> dict[str, Any]:
        self.be(who)
        result = CliRunner().invoke(keys.app, [*(str(argument) for argument in arguments), "--json"])
        if result.exception is not None:
            assert isinstance(result.exception, SwarmError), result.exception
            raise result.exception
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def hex(self, *names: str) -> list[str]:
        return [self.keys[name].public_key.hex() for name in names]


@pytest.fixture
def unstarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Organizers:
    return Organizers(tmp_path, monkeypatch)


@pytest.fixture
def people(unstarted: Organizers) -> Organizers:
    """After the first start, which wanted another's signature."""
    with pytest.raises(ConfigError, match="1 more"):
        unstarted.start()
    unstarted.run("bea", "sign", governing.folder(unstarted.state) / governing.CHANGE_FILE)
    unstarted.start()
    return unstarted


def test_a_run_of_several_organizers_starts_once_enough_have_signed_its_first_keys(unstarted: Organizers) -> None:
    with pytest.raises(ConfigError, match="1 more of the run's organizers must sign"):
        unstarted.start()
    path = governing.folder(unstarted.state) / governing.CHANGE_FILE
    unstarted.run("dora", "sign", path)
    with pytest.raises(ConfigError, match="1 more"):
        unstarted.start()
    told = unstarted.run("carl", "sign", path)
    assert told["missing"] == 0 and told["may_sign"] == unstarted.hex("bea")
    started = unstarted.start()
    assert not path.exists() and unstarted.start() == started


def test_keys_are_shown(people: Organizers) -> None:
    shown = people.run("carl", "show", people.run_file)
    assert shown["root"] == 1 and shown["threshold"] == 2
    assert shown["organizers"] == people.hex("anna", "bea", "carl")
    assert shown["publication_key"] == people.spec.publication_key
    assert people.run("dora", "id") == {"organizer_key": people.hex("dora")[0]}


def test_an_organizer_is_added_then_another_revoked_and_the_threshold_raised(people: Organizers) -> None:
    change = people.folder / "change.json"
    begun = people.run("anna", "add", people.run_file, people.hex("dora")[0], "--threshold", 3, "--out", change)
    assert (begun["missing"], begun["threshold"]) == (2, 3)
    assert set(begun["may_sign"]) == set(people.hex("bea", "carl", "dora"))
    people.run("dora", "sign", change)
    with pytest.raises(SignatureError, match="1/2"):
        people.run("anna", "publish", people.run_file, change)
    people.run("carl", "sign", change)
    assert people.run("anna", "publish", people.run_file, change)["root"] == 2
    people.run("anna", "revoke", people.run_file, people.hex("bea")[0], "--out", change)
    for name in ("carl", "dora"):
        people.run(name, "sign", change)
    after = people.run("anna", "publish", people.run_file, change)
    assert (after["root"], after["organizers"]) == (3, people.hex("anna", "carl", "dora"))
    with pytest.raises(VerificationError, match="cannot follow"):
        people.run("anna", "publish", people.run_file, change)


def test_a_publication_key_is_replaced_by_one_that_is_made_on_the_coordinators_machine(people: Organizers) -> None:
    change = people.folder / "change.json"
    begun = people.run("anna", "rotate", people.run_file, "--out", change)
    assert begun["publication_key"] != people.spec.publication_key and begun["missing"] == 1
    people.run("bea", "sign", change)
    after = people.run("anna", "publish", people.run_file, change)
    offline = governing.load(people.state, started_spec(people.state))
    assert offline is not None and len(offline.roots) == 2
    key = governance.check(people.spec.run_id, people.spec, offline)
    assert key.hex() == after["publication_key"]
    assert governing.publisher(people.state, key).public_key == key
    (people.state / "publication-2.key").unlink()
    with pytest.raises(ConfigError, match="is not in"):
        governing.publisher(people.state, key)


BAD_CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "a key that is in already": (("add", "bea"), "has a part"),
    "a key that is not in": (("revoke", "dora"), "no organizer"),
    "more signers than organizers": (("add", "dora", "--threshold", "5"), "could never sign"),
    "fewer organizers than must sign": (("revoke", "bea", "--threshold", "3"), "could never sign"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CHANGES.values(), ids=BAD_CHANGES.keys())
def test_a_change_that_makes_no_sense_is_refused(people: Organizers, arguments: tuple[str, ...], message: str) -> None:
    command, name, *options = arguments
    out = people.folder / "change.json"
    with pytest.raises(ConfigError, match=message):
        people.run("anna", command, people.run_file, people.hex(name)[0], *options, "--out", out)
    assert not out.exists()


def test_what_is_no_key_no_run_or_no_change_is_refused(people: Organizers, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no public key"):
        people.run("anna", "add", people.run_file, "abc")
    with pytest.raises(ConfigError, match="no run yet"):
        people.run("anna", "show", tmp_path / "elsewhere" / "run.toml")
    with pytest.raises(DataError, match="there is no"):
        people.run("anna", "sign", tmp_path / "absent.json")
    (tmp_path / "nonsense.json").write_text("{}")
    with pytest.raises(DataError, match="not a file with a change"):
        people.run("anna", "sign", tmp_path / "nonsense.json")


def test_a_change_whose_publication_broke_off_is_not_in_force_and_can_be_published_again(people: Organizers) -> None:
    change = people.folder / "change.json"
    people.run("anna", "rotate", people.run_file, "--out", change)
    people.run("carl", "sign", change)
    people.run("anna", "publish", people.run_file, change)
    (governing.folder(people.state) / "2.root.json").unlink()  # it is written last
    assert people.run("anna", "show", people.run_file)["root"] == 1
    assert people.run("anna", "publish", people.run_file, change)["root"] == 2


def test_a_damaged_folder_of_keys_is_told(people: Organizers) -> None:
    root = governing.folder(people.state) / "1.root.json"
    root.write_bytes(root.read_bytes().replace(b'"threshold":2', b'"threshold":1'))
    with pytest.raises(DigestError, match="damaged"):
        people.run("anna", "show", people.run_file)


def test_people_read_a_table_and_what_comes_next(people: Organizers) -> None:
    people.be("anna")
    shown = CliRunner().invoke(keys.app, ["show", str(people.run_file)]).stdout
    assert "2 of 3" in shown and "(this machine)" in shown
    out = str(people.folder / "change.json")
    begun = CliRunner().invoke(keys.app, ["rotate", str(people.run_file), "--out", out]).stdout
    assert "1 more must sign it" in begun
    people.be("bea")
    assert "swarm keys publish" in CliRunner().invoke(keys.app, ["sign", out]).stdout
