"""The names under which other modules still import the command line, see utils.flags."""

from utils.flags import FlagParser, build_parser, flags_for, parse_flags

__all__ = ["FlagParser", "build_parser", "flags_for", "parse_flags"]
