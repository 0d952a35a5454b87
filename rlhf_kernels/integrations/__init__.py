"""The ops inside other people's trainers and models. Each module needs the package it is named after, and no other."""
