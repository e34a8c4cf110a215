"""Thin bridges to web frameworks: parse, call the service, map the result to a status. Each is an optional extra."""
