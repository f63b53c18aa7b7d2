"""Python files of the user's own, which are run to read them."""

import contextlib
import importlib.util
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says where a file of the user's went wrong.

    Raises:
      ValueError: For whatever is raised inside; the message has file, line and reason.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == path.resolve()
        ]
        if isinstance(error, SyntaxError) and error.filename == str(path.resolve()):
            lines.append(error.lineno)
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        # As a traceback says it, whatever the error's own method to write it does.
        described = traceback.format_exception_only(error)
        reason = next(line for line in described if not line.startswith(" ")).strip()
        raise ValueError(f"{where}: {reason}; mend the file") from error


def module_of(
    path: Path, name: str
) -> tuple[types.ModuleType, Callable[[types.ModuleType], None]]:
    """The module of a Python file, still empty, and what runs the file to fill it."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    return module, specification.loader.exec_module


def run_as_import(path: Path) -> str:
    """Runs a Python file so that what is in it can be imported by the file's name.

    Modules beside it are found too, unless others of their names are installed.

    Args:
      path: The file.

    Returns:
      Name of its module.

    Raises:
      ValueError: If it fails, or a module of that name is there already.
    """
    name, file = path.stem, path.resolve()
    there = sys.modules.get(name)
    if there is not None:
        if Path(getattr(there, "__file__", None) or "").resolve() != file:
            raise ValueError(
                f"{path} cannot be told from the module {name} that is in use; rename "
                "the file"
            )
        return name
    if (folder := str(file.parent)) not in sys.path:
        # Behind all others: only this file is trusted, and nothing should find a
        # module beside it in place of one that is installed.
        sys.path.append(folder)
    module, run = module_of(file, name)
    # As an import does, so that classes in it know their module while it runs.
    sys.modules[name] = module
    try:
        with explained(path):
            run(module)
    except ValueError:
        del sys.modules[name]
        raise
    return name
