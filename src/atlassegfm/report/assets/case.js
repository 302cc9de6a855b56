"use strict";
(() => {
  const one = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];

  // Outlines of the slices can be hidden, one kind at a time.
  for (const box of all("[data-lines]")) {
    box.addEventListener("change", () => document.body.classList.toggle("hide-" + box.dataset.lines, !box.checked));
  }

  const block = document.getElementById("viewer-data");
  if (!block) return;
  const data = JSON.parse(block.textContent);
  const state = one("#viewer-state");
  const kinds = ["scan", "result", "atlas", "model"].filter((kind) => data.volumes[kind]);
  const single = { atlas: [255, 110, 169], model: [69, 208, 255] };

  async function unpacked(base64) {
    const bytes = Uint8Array.from(atob(base64.trim()), (sign) => sign.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  async function library() {
    const script = document.createElement("script");
    script.textContent = await unpacked(one("#niivue").textContent);
    document.head.append(script);
    return window.niivue;
  }

  // Label number n is the nth structure; all of one colour for what the result was made of.
  function colors(kind) {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    data.structures.forEach((structure, position) => {
      const [red, green, blue] = single[kind] || structure.color;
      table.R.push(red); table.G.push(green); table.B.push(blue); table.A.push(255);
      table.I.push(position + 1); table.labels.push(structure.name);
    });
    return table;
  }

  const opacity = (kind) => {
    const box = one(`[data-layer=${kind}]`);
    return box.checked ? Number(one(`[data-opacity=${kind}]`).value) / 100 : 0;
  };

  async function start() {
    const niivue = await library();
    const nv = new niivue.Niivue({
      backColor: [0.027, 0.035, 0.047, 1], crosshairColor: [1, 1, 1, 0.5], crosshairWidthUnit: "mm",
      isResizeCanvas: true, multiplanarShowRender: 1, multiplanarPadPixels: 4, multiplanarLayout: 2, logLevel: "error", show3Dcrosshair: false,
      sagittalNoseLeft: true, showAllOrientationMarkers: true, dragAndDropEnabled: false, fontMinPx: 12, isOrientCube: false,
    });
    await nv.attachToCanvas(one("#canvas"));
    nv.setRadiologicalConvention(true);
    for (const kind of kinds) {
      const base64 = data.volumes[kind];
      const volume = await niivue.NVImage.loadFromBase64({ base64, name: kind + ".nii.gz", colormap: "gray", opacity: 1 });
      if (kind !== "scan") volume.setColormapLabel(colors(kind));
      nv.addVolume(volume);
    }
    kinds.forEach((kind, index) => nv.setOpacity(index, opacity(kind)));
    const layouts = {
      multi: nv.sliceTypeMultiplanar, axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal,
      sagittal: nv.sliceTypeSagittal, render: nv.sliceTypeRender,
    };
    // In 3-D the body is a hull that hides what is in it: there it is faint and the structures are solid.
    const solid = { scan: 6, result: 100 };
    const before = {};
    // The canvas has the proportions of what it shows, mm, and the list of structures what is left beside it.
    const { dimsRAS, pixDimsRAS } = nv.volumes[0];
    const [x, y, z] = [1, 2, 3].map((axis) => dimsRAS[axis] * pixDimsRAS[axis]);
    const sizes = { multi: [x + y, y + z], axial: [x, y], coronal: [x, z], sagittal: [y, z], render: [4, 3] };
    let shown = "multi";
    const fit = () => {
      const [across, down] = sizes[shown];
      const beside = one(".names").offsetWidth && innerWidth > 760 ? 150 : 0;
      const wide = Math.min(one(".stage").clientWidth - beside, (across / down) * Math.min(0.75 * innerHeight, 720));
      Object.assign(one(".canvas").style, { width: `${wide}px`, height: `${(wide * down) / across}px` });
      nv.resizeListener();
      // Lines of the crosshair are about a pixel wide.
      const scales = nv.screenSlices.filter((tile) => tile.axCorSag < 3 && tile.fovMM[0])
        .map((tile) => Math.abs(tile.fovMM[0]) / tile.leftTopWidthHeight[2]);
      if (scales.length) nv.setCrosshairWidth(1.2 * devicePixelRatio * Math.max(...scales));
    };
    const choose = (kind) => {
      for (const layer of kinds.filter((name) => name in solid)) {
        const slider = one(`[data-opacity=${layer}]`);
        if (kind === "render" && !(layer in before)) {
          before[layer] = slider.value;
          slider.value = solid[layer];
        } else if (kind !== "render" && layer in before) {
          slider.value = before[layer];
          delete before[layer];
        }
        nv.setOpacity(kinds.indexOf(layer), opacity(layer));
      }
      nv.setSliceType(layouts[kind]);
      shown = kind;
      fit();
      for (const button of all("[data-layout]")) button.setAttribute("aria-pressed", String(button.dataset.layout === kind));
    };
    await nv.setVolumeRenderIllumination(0.4);
    nv.setScale(1.35);
    choose("multi");
    window.addEventListener("resize", fit);
    for (const button of all("[data-layout]")) button.addEventListener("click", () => choose(button.dataset.layout));
    for (const control of all("[data-layer], [data-opacity]")) {
      control.addEventListener("input", () => {
        const kind = control.dataset.layer || control.dataset.opacity;
        if (control.dataset.opacity) one(`[data-layer=${kind}]`).checked = true;
        nv.setOpacity(kinds.indexOf(kind), opacity(kind));
      });
    }
    one("#outline").addEventListener("change", (event) => {
      nv.overlayOutlineWidth = event.target.checked ? 1.5 : 0;
      nv.updateGLVolume();
    });
    const go = (value) => {
      const centre = data.centres[value];
      if (!centre) return;
      nv.scene.crosshairPos = nv.mm2frac(centre);
      nv.createOnLocationChange();
      nv.drawScene();
    };
    nv.onLocationChange = (location) => {
      const result = (location.values || []).find((entry) => entry.name && entry.name.startsWith("result"));
      const structure = result && data.structures[Math.round(result.value) - 1];
      const [right, front, up] = location.mm;
      const part = (value, positive, negative) => `${value >= 0 ? positive : negative} ${Math.abs(value).toFixed(0)}`;
      const place = `${part(right, "R", "L")}  ${part(front, "A", "P")}  ${part(up, "S", "I")} mm`;
      one("#where").textContent = (structure ? structure.name + " · " : "") + place;
    };
    for (const link of all("[data-value]")) {
      link.addEventListener("click", () => go(link.dataset.value));
    }
    const first = Object.keys(data.centres)[0];
    if (first) go(first);
    state.textContent = "";
    document.body.dataset.viewer = "ready";
    window.atlassegfmViewer = nv;
  }

  start().catch((error) => {
    state.textContent = `The interactive view needs WebGL 2 and a browser of 2023 or later (${error.message}).`;
    document.body.dataset.viewer = "failed";
  });
})();
