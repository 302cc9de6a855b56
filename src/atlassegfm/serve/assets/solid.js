// The 3-D view by NiiVue, where the browser has WebGL 2; slices do not need it.

import { call } from "./wire.js";

export const hasWebGL = Boolean(document.createElement("canvas").getContext("webgl2"));
let viewer = null, library = null, shown = "";

function load() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "niivue.js";
    script.onload = () => resolve(window.niivue);
    script.onerror = () => reject(new Error("NiiVue cannot be loaded"));
    document.head.append(script);
  });
  return library;
}

function table(structures, isShown) {
  const colors = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
  structures.forEach(({ color, name }, n) => {
    colors.R.push(color[0]);
    colors.G.push(color[1]);
    colors.B.push(color[2]);
    colors.A.push(isShown(n + 1) ? 255 : 0);
    colors.I.push(n + 1);
    colors.labels.push(name);
  });
  return colors;
}

// Show the draft of a case as it is on the server; not again if nothing changed.
export async function show(desk, canvas) {
  const wanted = [desk.id, desk.version, desk.solo && desk.structure].join(" ");
  if (wanted === shown) return;
  shown = wanted;
  const id = desk.id, [niivue, data] = await Promise.all([load(), call(`cases/${id}/solid`)]);
  if (id !== desk.id) return;
  if (!viewer) {
    viewer = new niivue.Niivue({
      backColor: [0.027, 0.035, 0.047, 1], isResizeCanvas: true, logLevel: "error", show3Dcrosshair: false,
      dragAndDropEnabled: false, isOrientCube: false, fontMinPx: 12, isOrientationTextVisible: false,
    });
    await viewer.attachToCanvas(canvas);
    viewer.setSliceType(viewer.sliceTypeRender);
    await viewer.setVolumeRenderIllumination(0.4);
    viewer.setScale(1.3);
  }
  const volumes = [];
  for (const [kind, opacity] of [["scan", 0.06], ["labels", 1]]) {
    const volume = await niivue.NVImage.loadFromBase64({ base64: data[kind], name: `${kind}.nii.gz`, colormap: "gray", opacity });
    if (kind === "labels") volume.setColormapLabel(table(desk.structures, desk.isShown));
    volumes.push(volume);
  }
  for (const old of [...viewer.volumes]) viewer.removeVolume(old);
  for (const one of volumes) viewer.addVolume(one);
  viewer.setOpacity(0, 0.06);
  viewer.drawScene();
}

export const resize = () => viewer?.resizeListener();
