//! Runs layers by a schedule, one autograd graph a layer, and drives the ZeRO units.
