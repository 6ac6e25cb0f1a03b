"""What `tiny` is pretrained on: glyphs, procedural pictures, crops of photographs, each with a description of itself."""
