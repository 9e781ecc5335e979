//! Units of flat buffers with ZeRO stages 0 to 3.
