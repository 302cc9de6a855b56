// Slices on a plain canvas: every voxel where it is, radiological display, axes as acquired.

// Axes along the normal, against the columns and against the rows of each plane.
export const PLANES = [
  { name: "axial", normal: 2, right: 0, down: 1 },
  { name: "coronal", normal: 1, right: 0, down: 2 },
  { name: "sagittal", normal: 0, right: 1, down: 2 },
];
const BARS_MM = [1, 2, 5, 10, 20, 50, 100, 200];
const MARGIN = 0.97;

export class SliceView {
  constructor(canvas, number) {
    Object.assign(this, PLANES[number], { canvas, number });
    this.context = canvas.getContext("2d");
    this.picture = document.createElement("canvas");
    this.cover = document.createElement("canvas");
  }

  // Where the picture lies on the canvas, in CSS pixels.
  layout(desk) {
    const { width, height } = this.canvas.getBoundingClientRect();
    const [sr, sd] = [desk.spacing[this.right], desk.spacing[this.down]];
    const [nr, nd] = [desk.shape[this.right], desk.shape[this.down]];
    const fit = MARGIN * Math.min(width / (nr * sr), height / (nd * sd));
    const scale = fit * desk.zoom;
    return { width, height, nr, nd, px: sr * scale, py: sd * scale, scale };
  }

  voxelAt(desk, x, y) {
    const { width, height, px, py } = this.layout(desk);
    const voxel = [...desk.cross];
    voxel[this.right] = desk.centre[this.right] - (x - width / 2) / px;
    voxel[this.down] = desk.centre[this.down] - (y - height / 2) / py;
    return voxel;
  }

  pointOf(desk, voxel, at = this.layout(desk)) {
    return [
      at.width / 2 + (desk.centre[this.right] - voxel[this.right]) * at.px,
      at.height / 2 + (desk.centre[this.down] - voxel[this.down]) * at.py,
    ];
  }

  draw(desk, cursor) {
    const at = this.layout(desk), ratio = devicePixelRatio;
    if (!at.width || !desk.scan) return;
    const wide = Math.round(at.width * ratio), high = Math.round(at.height * ratio);
    if (this.canvas.width !== wide || this.canvas.height !== high) Object.assign(this.canvas, { width: wide, height: high });
    const paper = this.context;
    paper.setTransform(ratio, 0, 0, ratio, 0, 0);
    paper.fillStyle = "#07090c";
    paper.fillRect(0, 0, at.width, at.height);
    const numbers = this.cut(desk, desk.labels);
    this.paint(desk, at, numbers);
    // The upper left corner of the picture: the last voxel of both axes, half a voxel beyond its centre.
    const corner = [0, 0, 0];
    corner[this.right] = at.nr - 0.5;
    corner[this.down] = at.nd - 0.5;
    const [x, y] = this.pointOf(desk, corner, at);
    paper.imageSmoothingEnabled = true;
    paper.imageSmoothingQuality = "high";
    paper.drawImage(this.picture, x, y, at.nr * at.px, at.nd * at.py);
    paper.imageSmoothingEnabled = false;
    paper.drawImage(this.cover, x, y, at.nr * at.px, at.nd * at.py);
    if (!desk.hidden) {
      const others = new Map();
      this.trace(at, numbers, x, y, (n) => desk.isShown(n), others);
      for (const [n, path] of others) this.stroke(path, desk.color(n), n === desk.structure ? 2.4 : 1.4, []);
    }
    for (const [kind, color, dash] of [["atlas", "#ff6ea9", [6, 4]], ["model", "#45d0ff", [2, 3]], ["version", "#ffd23f", [8, 2]]]) {
      if (!desk.maps[kind] || !desk.show[kind]) continue;
      const paths = new Map();
      this.trace(at, this.cut(desk, desk.maps[kind]), x, y, (n) => n === desk.structure, paths);
      for (const path of paths.values()) this.stroke(path, color, 1.6, dash);
    }
    this.letters(desk, at);
    this.crosshair(desk, at);
    if (cursor) this.cursor(desk, at, cursor);
  }

  // Numbers of the structures on the slice, first row on top.
  cut(desk, volume) {
    const [nx, ny] = desk.shape, steps = [1, nx, nx * ny];
    const nr = desk.shape[this.right], nd = desk.shape[this.down];
    const numbers = new volume.constructor(nr * nd);
    const start = desk.cross[this.normal] * steps[this.normal];
    for (let row = 0, to = 0; row < nd; row++) {
      let from = start + (nd - 1 - row) * steps[this.down] + (nr - 1) * steps[this.right];
      for (let column = 0; column < nr; column++, from -= steps[this.right]) numbers[to++] = volume[from];
    }
    return numbers;
  }

  paint(desk, at, numbers) {
    const values = this.cut(desk, desk.scan);
    const grey = this.context.createImageData(at.nr, at.nd), color = this.context.createImageData(at.nr, at.nd);
    const low = (desk.window.low - desk.intercept) / desk.slope;
    const factor = (255 * desk.slope) / (desk.window.high - desk.window.low);
    const alpha = desk.hidden ? 0 : Math.round(2.55 * desk.opacity);
    const one = new Uint32Array(grey.data.buffer), other = new Uint32Array(color.data.buffer);
    const colors = desk.colors.map(([r, g, b], n) =>
      (n && desk.isShown(n) && alpha ? ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0 : 0));
    for (let n = 0; n < values.length; n++) {
      const shade = (values[n] - low) * factor;
      const level = shade < 0 ? 0 : shade > 255 ? 255 : shade | 0;
      one[n] = (0xff000000 | (level << 16) | (level << 8) | level) >>> 0;
      if (numbers[n]) other[n] = colors[numbers[n]];
    }
    for (const [canvas, data] of [[this.picture, grey], [this.cover, color]]) {
      Object.assign(canvas, { width: at.nr, height: at.nd });
      canvas.getContext("2d").putImageData(data, 0, 0);
    }
  }

  // Outlines along the edges of voxels, one path for each structure.
  trace(at, numbers, x, y, isWanted, paths) {
    const { nr, nd, px, py } = at;
    const path = (n) => {
      if (!paths.has(n)) paths.set(n, new Path2D());
      return paths.get(n);
    };
    for (let row = 0, n = 0; row < nd; row++) {
      for (let column = 0; column < nr; column++, n++) {
        const here = numbers[n];
        if (!here || !isWanted(here)) continue;
        const left = x + column * px, top = y + row * py, right = left + px, bottom = top + py;
        const line = (a, b, c, d) => {
          const own = path(here);
          own.moveTo(a, b);
          own.lineTo(c, d);
        };
        if (!column || numbers[n - 1] !== here) line(left, top, left, bottom);
        if (column === nr - 1 || numbers[n + 1] !== here) line(right, top, right, bottom);
        if (!row || numbers[n - nr] !== here) line(left, top, right, top);
        if (row === nd - 1 || numbers[n + nr] !== here) line(left, bottom, right, bottom);
      }
    }
  }

  stroke(path, color, width, dash) {
    const paper = this.context;
    paper.strokeStyle = color;
    paper.lineWidth = width;
    paper.lineCap = "square";
    paper.setLineDash(dash);
    paper.stroke(path);
    paper.setLineDash([]);
  }

  letters(desk, at) {
    const paper = this.context, { letters, tilt } = desk.views[this.number];
    paper.font = "600 12px system-ui, sans-serif";
    paper.fillStyle = "#eef1f5";
    paper.shadowColor = "#000";
    paper.shadowBlur = 3;
    const [left, right, top, bottom] = letters;
    const places = [[left, 9, at.height / 2, "left"], [right, at.width - 9, at.height / 2, "right"],
      [top, at.width / 2, 15, "center"], [bottom, at.width / 2, at.height - 9, "center"]];
    for (const [text, x, y, align] of places) {
      paper.textAlign = align;
      paper.fillText(text, x, y);
    }
    paper.textAlign = "left";
    paper.font = "500 11.5px system-ui, sans-serif";
    paper.fillStyle = "#c9d1dc";
    const count = desk.shape[this.normal];
    paper.fillText(`${this.name} ${desk.cross[this.normal] + 1} / ${count}${tilt ? `, ${tilt}` : ""}`, 9, 16);
    const length = BARS_MM.filter((n) => n * at.scale <= Math.max(0.25 * at.width, at.scale)).pop() ?? 1;
    paper.fillStyle = "#eef1f5";
    paper.fillRect(10, at.height - 12, length * at.scale, 2);
    paper.fillText(`${length} mm`, 10, at.height - 17);
    paper.shadowBlur = 0;
  }

  crosshair(desk, at) {
    const [x, y] = this.pointOf(desk, desk.cross, at), gap = 9, paper = this.context;
    paper.strokeStyle = desk.active === this.number ? "rgba(255,255,255,.55)" : "rgba(255,255,255,.3)";
    paper.lineWidth = 1;
    paper.beginPath();
    for (const [a, b, c, d] of [[0, y, x - gap, y], [x + gap, y, at.width, y], [x, 0, x, y - gap], [x, y + gap, x, at.height]]) {
      paper.moveTo(a, b);
      paper.lineTo(c, d);
    }
    paper.stroke();
  }

  cursor(desk, at, { x, y }) {
    const paper = this.context;
    if (desk.tool === "paint" || desk.tool === "erase") {
      const radius = Math.max((desk.size / 2) * at.scale, 2);
      paper.strokeStyle = desk.tool === "paint" ? desk.color(desk.structure) : "#fff";
      paper.lineWidth = 1.5;
      paper.beginPath();
      paper.arc(x, y, radius, 0, 7);
      paper.stroke();
    } else if (desk.tool === "click") {
      const [i, j, k] = this.voxelAt(desk, x, y).map(Math.round);
      const removes = desk.labels[i + desk.shape[0] * (j + desk.shape[1] * k)] === desk.structure;
      paper.strokeStyle = removes ? "#ff9b91" : "#6fdca0";
      paper.lineWidth = 2;
      paper.beginPath();
      paper.arc(x, y, 8, 0, 7);
      paper.moveTo(x - 4, y);
      paper.lineTo(x + 4, y);
      if (!removes) {
        paper.moveTo(x, y - 4);
        paper.lineTo(x, y + 4);
      }
      paper.stroke();
    }
  }
}

// Places of the voxels whose centres a brush of a diameter in mm touches, on its plane or in 3-D; at least one.
export function dab(desk, view, voxel, deep) {
  const radius = desk.size / 2, middle = voxel.map(Math.round), found = [];
  const [nx, ny] = desk.shape;
  const reach = desk.spacing.map((s, axis) => (axis === view.normal && !deep ? 0 : Math.floor(radius / s + 1)));
  const range = (axis) => [Math.max(middle[axis] - reach[axis], 0), Math.min(middle[axis] + reach[axis], desk.shape[axis] - 1)];
  const [[i0, i1], [j0, j1], [k0, k1]] = [range(0), range(1), range(2)];
  for (let k = k0; k <= k1; k++) {
    for (let j = j0; j <= j1; j++) {
      for (let i = i0; i <= i1; i++) {
        const far = Math.hypot(...[i, j, k].map((n, axis) =>
          (axis === view.normal && !deep ? 0 : (n - voxel[axis]) * desk.spacing[axis])));
        if (far <= radius || (i === middle[0] && j === middle[1] && k === middle[2])) found.push(i + nx * (j + ny * k));
      }
    }
  }
  return found;
}
