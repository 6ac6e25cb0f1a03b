"""What `tiny` is pretrained on: glyphs, procedural pictures, crops of photographs, each with what it shows."""
