// A safetensors document: 8 bytes of length, a JSON header, then the tensors' bytes.
const kinds = { F32: Float32Array, U8: Uint8Array };

export function readTensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__: metadata, ...entries } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensors = {};
  for (const [name, { dtype, data_offsets: [start, stop] }] of Object.entries(entries))
    tensors[name] = new kinds[dtype](buffer.slice(8 + length + start, 8 + length + stop));
  return { tensors, metadata };
}
