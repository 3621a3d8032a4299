// Which point lies nearest to a place: points sorted into square cells once, then a few cells looked at.
const PER_CELL = 4;

export class PointGrid {
  // places: Float32Array of x, y pairs
  constructor(places) {
    this.places = places;
    const num = places.length / 2;
    let [left, bottom, right, top] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < num; i++) {
      left = Math.min(left, places[2 * i]); right = Math.max(right, places[2 * i]);
      bottom = Math.min(bottom, places[2 * i + 1]); top = Math.max(top, places[2 * i + 1]);
    }
    Object.assign(this, { left, bottom, right, top });
    this.size = Math.max(right - left, top - bottom, 1e-9) / Math.max(1, Math.ceil(Math.sqrt(num / PER_CELL)));
    this.columns = Math.floor((right - left) / this.size) + 1;
    this.rows = Math.floor((top - bottom) / this.size) + 1;
    this.starts = new Uint32Array(this.columns * this.rows + 1);
    const cells = new Uint32Array(num);
    for (let i = 0; i < num; i++) {
      cells[i] = this.cell(places[2 * i], places[2 * i + 1]);
      this.starts[cells[i] + 1]++;
    }
    for (let c = 0; c < this.starts.length - 1; c++) this.starts[c + 1] += this.starts[c];
    this.order = new Uint32Array(num);
    const filled = this.starts.slice();
    for (let i = 0; i < num; i++) this.order[filled[cells[i]]++] = i;
  }

  cell(x, y) {
    return Math.floor((y - this.bottom) / this.size) * this.columns + Math.floor((x - this.left) / this.size);
  }

  // The row of the point within `radius` of x, y that lies nearest; -1 for none.
  nearest(x, y, radius) {
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    const first = (from, start, most) => clamp(Math.floor((from - start) / this.size), most);
    const [c0, c1] = [x - radius, x + radius].map((at) => first(at, this.left, this.columns - 1));
    const [r0, r1] = [y - radius, y + radius].map((at) => first(at, this.bottom, this.rows - 1));
    let [best, least] = [-1, radius * radius];
    for (let row = r0; row <= r1; row++)
      for (let place = this.starts[row * this.columns + c0]; place < this.starts[row * this.columns + c1 + 1]; place++) {
        const i = this.order[place];
        const distance = (this.places[2 * i] - x) ** 2 + (this.places[2 * i + 1] - y) ** 2;
        if (distance <= least && (distance < least || best < 0 || i < best)) [best, least] = [i, distance];
      }
    return best;
  }
}
