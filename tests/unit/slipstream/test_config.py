"""What wins, what is refused, and whether a person can tell where a value came from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from slipstream import config, config_file
from slipstream.config_layer import Origin, flag_name, setting_fields, variable_name
from slipstream.errors import ConfigError
from slipstream.settings import Settings

HTTP_PORT = "frontend.http_port"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "slipstream.yaml"


def refused(flags: dict[str, object], environ: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(flags, environ, file)
    return caught.value.message


def test_without_anything_all_values_are_defaults() -> None:
    loaded = config.load({}, {}, None)
    assert loaded.settings == Settings()
    assert set(loaded.origins) == set(setting_fields())
    assert set(loaded.origins.values()) == {Origin("default")}


def test_each_source_beats_the_ones_below_it_and_is_named_as_the_origin(file: Path) -> None:
    file.write_text("model: from-file\nfrontend:\n  http_port: 1\n  grpc_port: 2\n")
    environ = {"SLIPSTREAM_FRONTEND__HTTP_PORT": "3", "SLIPSTREAM_DEVICE": "cpu"}
    loaded = config.load({"device": "cuda"}, environ, file)
    face = loaded.settings.frontend
    assert (loaded.settings.model, face.grpc_port, face.http_port, loaded.settings.device) == (
        "from-file",
        2,
        3,
        "cuda",
    )
    origins = [str(loaded.origins[path]) for path in ("model", "frontend.grpc_port", HTTP_PORT, "device", "dtype")]
    assert origins == [f"{file}:1", f"{file}:4", "SLIPSTREAM_FRONTEND__HTTP_PORT", "--device", "default"]


INTEGERS = [
    path
    for path, info in setting_fields().items()
    if info.annotation is int and not path.endswith("control_plane.port")
]
SOME_LAYER = st.dictionaries(st.sampled_from(INTEGERS), st.integers(64, 128), max_size=4)


@given(flags=SOME_LAYER, environ=SOME_LAYER, in_file=SOME_LAYER)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_strongest_source_that_gives_a_setting_gives_its_value_and_its_origin(
    tmp_path: Path, flags: dict[str, int], environ: dict[str, int], in_file: dict[str, int]
) -> None:
    usable = {path for path in INTEGERS if accepts(path, 64) and accepts(path, 128)}
    flags, environ, in_file = ({k: v for k, v in layer.items() if k in usable} for layer in (flags, environ, in_file))
    file = tmp_path / "law.yaml"
    file.write_text("".join(f"{p.partition('.')[0]}: {{{p.partition('.')[2]}: {v}}}\n" for p, v in one_each(in_file)))
    given_in_file = dict(one_each(in_file))
    variables = {variable_name(path): str(value) for path, value in environ.items()}
    loaded = config.load(dict(flags), variables, file)
    for path in INTEGERS:
        value = value_of(loaded.settings, path)
        if path in flags:
            assert (value, loaded.origins[path].kind) == (flags[path], "flag")
        elif path in environ:
            assert (value, str(loaded.origins[path])) == (environ[path], variable_name(path))
        elif path in given_in_file:
            assert (value, loaded.origins[path].kind) == (given_in_file[path], "file")
        else:
            assert (value, loaded.origins[path].kind) == (value_of(Settings(), path), "default")


def accepts(path: str, value: int) -> bool:
    try:
        config.load({path: value}, {}, None)
    except ConfigError:
        return False
    return True


def one_each(values: dict[str, int]) -> list[tuple[str, int]]:
    """One setting of each section, as the file of the law has one line for each."""
    return list({path.partition(".")[0]: (path, value) for path, value in values.items()}.values())


def value_of(settings: Settings, path: str) -> object:
    value: object = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@given(
    model=TEXT,
    served=st.none() | TEXT,
    lease_s=st.floats(0.5, 300),
    timeout_s=st.floats(0, 86400, exclude_min=True),
    threads=st.none() | st.integers(1, 2**40),
    folder=st.none() | st.just(Path("/var/log/x y")),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_what_is_loaded(
    tmp_path: Path,
    model: str,
    served: str | None,
    lease_s: float,
    timeout_s: float,
    threads: int | None,
    folder: Path | None,
) -> None:
    base = Settings()
    settings = base.model_copy(
        update={
            "model": model,
            "served_model_name": served,
            "control_plane": base.control_plane.model_copy(update={"lease_s": lease_s}),
            "frontend": base.frontend.model_copy(update={"request_timeout_s": timeout_s}),
            "worker": base.worker.model_copy(update={"threads": threads}),
            "cluster": base.cluster.model_copy(update={"log_dir": folder}),
        }
    )
    file = tmp_path / "written.yaml"
    config_file.write(settings, file)
    loaded = config.load({}, {}, file)
    assert loaded.settings == settings
    assert {origin.kind for origin in loaded.origins.values()} == {"file"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"SLIPSTREAM_FRONTEND__HTTP_PORT": "70000"},
            "frontend.http_port = '70000' (SLIPSTREAM_FRONTEND__HTTP_PORT): must be less than or equal to 65535 "
            "(port of the OpenAI-compatible HTTP face)",
        ),
        ({"SLIPSTREAM_DEVICE": "tpu"}, "device = 'tpu' (SLIPSTREAM_DEVICE): must be 'auto', 'cpu' or 'cuda' (where"),
        (
            {"SLIPSTREAM_FRONTEND__HTP_PORT": "1"},
            "environment variable SLIPSTREAM_FRONTEND__HTP_PORT is not a setting; "
            "did you mean SLIPSTREAM_FRONTEND__HTTP_PORT?",
        ),
        (
            {"SLIPSTREAM_frontend__http_port": "1"},
            "environment variable SLIPSTREAM_frontend__http_port is not a setting; "
            "did you mean SLIPSTREAM_FRONTEND__HTTP_PORT?",
        ),
    ],
)
def test_a_wrong_variable_is_named_with_its_value_and_limit(environ: dict[str, str], message: str) -> None:
    assert refused({}, environ).startswith(message)


def test_every_wrong_setting_is_reported_at_once() -> None:
    lines = refused({HTTP_PORT: -1}, {"SLIPSTREAM_WORKER__THREADS": "none"}).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [HTTP_PORT, "worker.threads"]


def test_a_wrong_flag_is_named_as_the_command_spells_it() -> None:
    with pytest.raises(ConfigError, match=r"frontend\.http_port = -1 \(--http-port\): must be greater"):
        config.load({HTTP_PORT: -1}, {}, None, flag_names={HTTP_PORT: "--http-port"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\nfrontend:\n  http_prt: 1\n", "frontend.http_prt ({file}:3) is not a setting; did you mean f"),
        ("http_port: 1\n", "http_port ({file}:1) is not a setting; did you mean frontend.http_port?"),
        ("frntend:\n  http_port: 1\n", "frntend ({file}:1) is not a setting; did you mean frontend?"),
        ("model: x\nmodel: y\n", "{file}:2: model was already set in line 1"),
        ("model: [a, b]\n", "model ({file}:1) must be a single value, not a list or mapping"),
        ("frontend: 3\n", "frontend ({file}:1) must be a mapping of names to values"),
        ("- model\n", "the file ({file}:1) must be a mapping of names to values"),
        ("? [a]\n: b\n", "{file}:1: a setting's name must be plain text"),
        ("<<: {{model: x}}\n", "{file}:1: merge keys (<<) are not supported"),
        ("model: x\nfrontend: [1\n", "{file}:3: not YAML: expected ',' or ']'"),
        ("model: x\n---\nmodel: y\n", "{file}:2: not YAML: but found another document"),
        ("model: !!python/object/apply:os.system [ls]\n", "model ({file}:1) must be a single value"),
        ("model: !!python/name:os.system ''\n", "{file}:1: not YAML: could not determine a constructor"),
        ("model: \x00\n", "{file}: not YAML: unacceptable character"),
        ("frontend:\n  http_port: 99999\n", "frontend.http_port = 99999 ({file}:2): must be less than or equal"),
        ("model: 7\n", "model = 7 ({file}:1): must be a valid string"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(file: Path, text: str, message: str) -> None:
    file.write_text(text.replace("{{", "{").replace("}}", "}"))
    assert refused({}, {}, file).startswith(message.format(file=file))


def test_a_file_that_expands_without_end_is_refused_at_once(file: Path) -> None:
    file.write_text("\n".join(["model: &a0 [x]", *(f"m{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]))
    assert "must be a single value" in refused({}, {}, file)


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"model: \xff\xfe")
    assert refused({}, {}, file) == f"{file}: not UTF-8 text (byte 7)"


def test_a_huge_file_is_refused_and_not_read(file: Path) -> None:
    file.write_bytes(b"#" * (2 << 20))
    assert "larger than" in refused({}, {}, file)


def test_empty_files_and_empty_sections_give_nothing(file: Path) -> None:
    for text in ("", "# nothing\n", "frontend:\nworker: {}\n"):
        file.write_text(text)
        assert config.load({}, {}, file).settings == Settings()


def test_an_empty_variable_counts_as_absent_and_null_as_none(file: Path) -> None:
    file.write_text("worker:\n  threads: 4\nmodel: x\n")
    loaded = config.load({}, {"SLIPSTREAM_MODEL": "", "SLIPSTREAM_WORKER__THREADS": "null"}, file)
    assert (loaded.settings.model, loaded.settings.worker.threads) == ("x", None)
    assert str(loaded.origins["worker.threads"]) == "SLIPSTREAM_WORKER__THREADS"


def test_null_is_an_ordinary_word_for_a_setting_that_cannot_be_absent() -> None:
    assert config.load({}, {"SLIPSTREAM_MODEL": "null"}, None).settings.model == "null"


def test_variables_that_kubernetes_adds_for_services_of_our_name_are_no_settings() -> None:
    environ = {
        "SLIPSTREAM_FRONTEND_SERVICE_HOST": "10.0.0.1",
        "SLIPSTREAM_FRONTEND_SERVICE_PORT": "8000",
        "SLIPSTREAM_FRONTEND_SERVICE_PORT_HTTP": "8000",
        "SLIPSTREAM_FRONTEND_PORT": "tcp://10.0.0.1:8000",
        "SLIPSTREAM_FRONTEND_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "SLIPSTREAM_FRONTEND_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert config.load({}, environ, None).settings == Settings()


def test_a_misspelled_port_is_not_taken_for_a_kubernetes_variable() -> None:
    assert refused({}, {"SLIPSTREAM_HTTP_PORT": "8000"}).startswith("environment variable SLIPSTREAM_HTTP_PORT is not")


def test_variables_of_other_programs_are_not_ours() -> None:
    assert config.load({}, {"PATH": "/bin", "VLLM_PORT": "1"}, None).settings == Settings()


def test_an_unknown_flag_is_a_mistake_too() -> None:
    assert refused({"frontend.htp_port": 1}, {}).startswith("frontend.htp_port (--frontend-htp-port) is not a setting")


@pytest.mark.parametrize(
    ("flags", "address"),
    [
        ({"control_plane.port": 7700}, "127.0.0.1:7700"),
        ({"control_plane.host": "10.1.2.3"}, "10.1.2.3:7600"),
        ({"control_plane.host": "0.0.0.0", "control_plane.port": 1}, "127.0.0.1:1"),
        ({"control_plane.host": "fe80::1"}, "[fe80::1]:7600"),
        ({"control_plane.port": 7700, "control_plane.address": "registry:1"}, "registry:1"),
    ],
)
def test_moving_the_control_plane_moves_the_address_unless_that_is_said(flags: dict[str, object], address: str) -> None:
    loaded = config.load(flags, {}, None)
    assert loaded.settings.control_plane.address == address
    if "control_plane.address" not in flags:
        assert str(loaded.origins["control_plane.address"]).startswith("from control_plane.")


def test_the_file_is_the_flags_then_the_variables_then_the_one_in_the_folder(tmp_path: Path) -> None:
    given, named, implied = (tmp_path / name for name in ("given.yaml", "named.yaml", "slipstream.yaml"))
    assert config.find_file(None, {}, tmp_path) is None
    for file in (given, named, implied):
        file.touch()
    environ = {"SLIPSTREAM_CONFIG": str(named)}
    assert config.find_file(given, environ, tmp_path) == given
    assert config.find_file(None, environ, tmp_path) == named
    assert config.find_file(None, {}, tmp_path) == implied


def test_a_file_that_was_asked_for_and_is_not_there_is_an_error_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml \(from --config\) is not a file"):
        config.find_file(tmp_path / "none.yaml", {}, tmp_path)
    with pytest.raises(ConfigError, match=r"\(from SLIPSTREAM_CONFIG\) is not a file"):
        config.find_file(None, {"SLIPSTREAM_CONFIG": str(tmp_path)}, tmp_path)


def test_every_setting_has_a_description_and_a_name_of_its_own_everywhere() -> None:
    fields = setting_fields()
    assert [path for path, info in fields.items() if not info.description] == []
    assert len({variable_name(path) for path in fields}) == len({flag_name(path) for path in fields}) == len(fields)


def test_dump_is_plain_data() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(each) for key, each in value.items())
        if isinstance(value, list):
            return all(plain(each) for each in value)
        return value is None or (isinstance(value, str | int | float) and value == value and value != math.inf)

    assert plain(config.dump(Settings()))
