"""Declaration of a config key or a section in the schema."""

from collections.abc import Mapping
import enum
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict


class Resume(enum.Enum):
  """Policy of a resumed run for a config key.

  Attributes:
    FIXED: The key must stay: another value would be another run.
    BY_NAME: The key may change if the command line names it. It changes how
      training ends, so another --config file must not change it by accident.
    FREE: The key may change. It affects reports, files or the end of a run.
  """

  FIXED = 'fixed'
  BY_NAME = 'by name'
  FREE = 'free'


_NOUNS = {
  bool: 'true or false',
  int: 'an integer',
  float: 'a number',
  str: 'a text',
}


class Field(NamedTuple):
  """Type, range, meaning and resume policy of a config key.

  Attributes:
    kind: bool, int, float or str.
    meaning: Meaning, with its unit; a noun phrase.
    low, most: Smallest and largest value.
    above, below: Exclusive bounds. Integers are below 2**31 by default.
    choices: Allowed texts; () allows any.
    resume: Policy of a resumed run for the key.
    allow: Name in --allow_changed that makes a FIXED key changeable.
    absent: Value of runs of versions that did not have the key; None if every
      version has it.
    renamed: Values of older versions, by their old name; a boolean's is 'true'
      or 'false'.
  """

  kind: type
  meaning: str
  low: float | None = None
  below: float | None = None
  above: float | None = None
  most: float | None = None
  choices: tuple[str, ...] = ()
  resume: Resume = Resume.FIXED
  allow: str = ''
  absent: Any = None
  renamed: Mapping[str, str] = {}

  @property
  def allowed(self) -> str:
    """Sentence part that says which values are allowed."""
    if self.choices:
      return f'one of {", ".join(map(repr, self.choices))}'
    bounds = [
      f'{sign} {bound:.10g}'
      for sign, bound in (
        ('>=', self.low),
        ('>', self.above),
        ('<=', self.most),
        ('<', self.below),
      )
      if bound is not None
    ]
    return f'{_NOUNS[self.kind]} {" and ".join(bounds)}'.strip()


class SpecField(NamedTuple):
  """Section with a `type`; its other keys are arguments of that type.

  Attributes:
    meaning: Choice that the section makes; a noun phrase.
    resume, allow: As of `Field`, for the type and for all arguments.
    absent: Type in runs of versions that did not have the section; None if
      every version has it.
    renamed: Types of older versions, by their old name.
  """

  meaning: str
  resume: Resume = Resume.FIXED
  allow: str = ''
  absent: str | None = None
  renamed: Mapping[str, str] = {}


def key(
  meaning: str,
  low: int | float | None = None,
  below: int | float | None = None,
  **rest: Any,
) -> Any:
  """Returns a Field without its kind, which the annotation states."""
  return Field(object, meaning, low, below, **rest)


def spec(meaning: str, **rest: Any) -> Any:
  """Returns a SpecField."""
  return SpecField(meaning, **rest)


if TYPE_CHECKING:
  Section = ConfigDict
else:

  class _IsConfigDict(type):
    """Metaclass that makes a ConfigDict an instance of every section."""

    def __instancecheck__(cls, value):
      return isinstance(value, ConfigDict)

  class Section(metaclass=_IsConfigDict):
    """Section of a config: at run time a ConfigDict."""


class Spec(Section):
  """Section with a `type`: a name or an import path, and its arguments."""

  type: str
