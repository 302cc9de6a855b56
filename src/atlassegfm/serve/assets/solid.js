// The 3-D view by NiiVue, where the browser has WebGL 2; slices do not need it.

import { call } from "./wire.js";

export const hasWebGL = Boolean(document.createElement("canvas").getContext("webgl2"));
let viewer = null, library = null, shown = "", scanOf = null;

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
  // The scan is loaded once; after an edit only the labels are.
  const id = desk.id, kinds = scanOf === id ? ["labels"] : ["scan", "labels"];
  const [niivue, ...files] = await Promise.all([load(), ...kinds.map((kind) => call(`cases/${id}/solid/${kind}`))]);
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
  const volumes = await Promise.all(kinds.map((kind, n) => niivue.NVImage.loadFromBase64({
    base64: files[n].nifti, name: `${kind}.nii.gz`, colormap: "gray", opacity: kind === "scan" ? 0.06 : 1,
  })));
  volumes.at(-1).setColormapLabel(table(desk.structures, desk.isShown));
  for (const old of viewer.volumes.slice(kinds.length === 1 ? 1 : 0)) viewer.removeVolume(old);
  for (const one of volumes) viewer.addVolume(one);
  scanOf = id;
  viewer.setOpacity(0, 0.06);
  viewer.drawScene();
}

export const resize = () => viewer?.resizeListener();
