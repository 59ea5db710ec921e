"""Engines that execute exported models without torch."""
